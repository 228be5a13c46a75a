"""The files that describe a run: its record, its metrics, its model card and its report."""

__all__: list[str] = []
