import pytest
import tiny

from vggtorch.models import remember_
from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture
def config(tmp_path):
    return TrainConfig(epochs=3, batch_size=6, image_size=16, output_dir=str(tmp_path / "run"))


@pytest.fixture(scope="session")
def history(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    config = TrainConfig(epochs=2, batch_size=6, image_size=16, output_dir=str(folder / "run"))
    model = remember_(tiny.network(), "oxford")
    return finetune(model, tiny.pictures(folder / "data"), config=config)
