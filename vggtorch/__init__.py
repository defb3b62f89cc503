"""Transfer learning and model surgery on pretrained VGG networks, the Keras way, on PyTorch.

Importing vggtorch selects Keras's torch backend, so import it before Keras. It imports nothing
else: a public name brings the room that it stands in when it is first used. `__init__.pyi` beside
this file lists the names and their rooms.
"""

import gc
import os
import sys
from importlib.machinery import PathFinder

import lazy_loader

__version__ = "0.1.0"


def _greet_keras():
    """See that Keras runs on torch, and let it know the classes of our models."""
    backend = sys.modules["keras"].config.backend()
    if backend != "torch":
        raise ImportError(
            f"vggtorch needs Keras on its torch backend, but Keras already runs on {backend!r}. "
            f"Import vggtorch before keras, or set KERAS_BACKEND=torch before Python starts."
        )
    import vggtorch.keras_graph  # noqa: F401 - registers the classes


class _KerasWatch:
    """Greets Keras as soon as anybody has imported it.

    keras.saving.load_model must know our models' classes after `import vggtorch`, also where no
    name of vggtorch was touched yet; importing Keras here would cost `vggtorch --help` seconds.
    """

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "keras" else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_greet(module):
                # To look for cycles in all that is imported would be a quarter of the time.
                paused = gc.isenabled()
                gc.disable()
                try:
                    execute(module)
                    _greet_keras()
                finally:
                    if paused:
                        # All of it is old now: else the next look, in a user's own work, would be
                        # at half a million objects.
                        if not gc.get_freeze_count():
                            gc.freeze()
                            gc.unfreeze()
                        gc.enable()

            spec.loader.exec_module = execute_and_greet  # type: ignore[method-assign]
        return spec


if "keras" in sys.modules:
    _greet_keras()
else:
    os.environ["KERAS_BACKEND"] = "torch"
    sys.meta_path.insert(0, _KerasWatch())

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
