"""One Prefect flow per phase, and `pipeline`, which reads like the table of phases."""
