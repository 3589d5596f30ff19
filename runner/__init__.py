"""A run from start to finish, and what is done with a finished network.

`runner` imports `common`, never the other way round, and neither names a paper. Scripts call these
modules; these modules never call a script, except through the declarations that `papers` finds.
"""
