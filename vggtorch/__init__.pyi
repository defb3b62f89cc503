# The public names and where each comes from: __init__.py reads them here when they are first used.

from .compression import compress as compress
from .features import LPIPS as LPIPS
from .features import FeatureExtractor as FeatureExtractor
from .features import PerceptualLoss as PerceptualLoss
from .lowering import accelerate_ as accelerate_
from .lowering import export as export
from .lowering import to_torch as to_torch
from .measuring import bench as bench
from .measuring import compare as compare
from .measuring import draw as draw
from .measuring import inspect as inspect
from .models import VGG11 as VGG11
from .models import VGG13 as VGG13
from .models import VGG16 as VGG16
from .models import VGG19 as VGG19
from .models import data_config as data_config
from .models import decode_predictions as decode_predictions
from .models import load_model as load_model
from .models import load_weights as load_weights
from .models import named_variables as named_variables
from .models import preprocess as preprocess
from .models import save_weights as save_weights
from .models import weight_set as weight_set
from .surgery import compose_ as compose_
from .surgery import deletable_channels as deletable_channels
from .surgery import delete_channels as delete_channels
from .surgery import distill_ as distill_
from .surgery import flatten as flatten
from .surgery import freeze_ as freeze_
from .surgery import insert as insert
from .surgery import remove as remove
from .surgery import rename as rename
from .surgery import replace as replace
from .surgery import replace_where as replace_where
from .surgery import stack as stack
from .surgery import truncate as truncate
from .surgery import unfreeze_ as unfreeze_
from .surgery import with_input as with_input
from .training import Callback as Callback
from .training import TrainConfig as TrainConfig
from .training import advise as advise
from .training import evaluate_folder as evaluate_folder
from .training import find_learning_rate as find_learning_rate
from .training import finetune as finetune
from .training import load_checkpoint_ as load_checkpoint_
from .training import predict_files as predict_files
from .training import push_to_hub as push_to_hub
from .training import read_features as read_features
from .training import save_trained as save_trained
from .training import write_features as write_features
from .training import write_predictions as write_predictions
from .training import write_report as write_report
from .training import write_test_report as write_test_report

__all__: list[str]
__version__: str
