"""Fine-tuning: one plain torch loop, its data, its checkpoints and its report.

Read `config` first, then `advice`, `data`, `features`, `checkpoints`, `display`, `loop`, `report`.
The names for other rooms stand in `__init__.pyi` and are imported when they are first used, so
that the command line can ask TrainConfig for its fields without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
