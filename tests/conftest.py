import vggtorch  # noqa: F401 - before any test imports Keras: it selects the torch backend
