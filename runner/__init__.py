"""Manage a run from start to finish, and evaluate a finished network.

`runner` imports `common`, never the other way round, and neither names a paper. Scripts call these
modules; these modules reach scripts only through the declarations that `papers` finds.
"""
