"""Before training: what a run will read, how long it will take, and whether it fits into memory."""

__all__: list[str] = []
