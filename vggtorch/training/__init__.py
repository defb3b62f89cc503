"""Fine-tuning: one plain torch loop, what it reads, what it writes.

Read `config` first, which says what can be asked for, and `loop`, which does it from top to bottom.
What the loop calls, in the order in which it calls: `opening` (the configuration by advice, and the
first lines that a run says), `run` (the data, the device, and the state that a checkpoint holds),
`tables`, `folders` and `splits` (which images there are, their classes, and what they are for),
`items` (what data sets of others give), `data` (images by index and augmentation), `loaders`
(torch's as such, with their own batches), `reading` (batches of all), `balance` (classes of unequal
size), `heads` (new layers on top), `identity` (what makes a run the run that it is), `history`
(what comes out of it), `optimization` (what trains, how fast), `schedules` (learning rates over
time), `callbacks` (what users call in between), `trackers` (Accelerate's, which keep the figures),
`features` (frozen layers run once), `stages` (what trains between two changes of what is frozen),
`step` (one optimizer step), `mixing` (mixup and cutmix), `evaluation` (how well it does),
`temperature` (how sure it may be), `checkpoints` (their file), `stopping` (Ctrl-C) and `display`
(the progress bar). Around the loop stand `advice` (a configuration by rules of thumb),
`rate_search` (a learning rate), `batch_view` (what the network sees), `charts`, `report`,
`pictures` and `confusion` (the page), `keeping` and `card` (the model, and what it says of itself).
What is done with a trained model stands in `prediction` (classes of many images, scores on a test
set), `feature_table` (a layer's output as Parquet) and `publishing` (the Hugging Face hub).

The names for other rooms stand in `__init__.pyi` and are imported when they are first used, so
that the command line can ask TrainConfig for its fields without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
