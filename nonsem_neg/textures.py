from common.sets import original_root_of, pair_by_path  # noqa: F401  (placeholder until the move)
