"""After training: talk to a model, merge its adapter, and export it."""

__all__: list[str] = []
