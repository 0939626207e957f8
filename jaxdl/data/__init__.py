"""Data: sources of rows, their order, transforms, and batches as a function of (seed, step)."""

from jaxdl.data.augment import color_jitter, cutout, rand_augment, random_crop, random_flip, random_rotate
from jaxdl.data.cifar10 import CIFAR10_CLASSES, load_cifar10
from jaxdl.data.digits import load_digits
from jaxdl.data.fashion_mnist import load_fashion_mnist, load_idx, read_idx
from jaxdl.data.folder import ImageFolder
from jaxdl.data.mix import cutmix, mixup
from jaxdl.data.order import Order
from jaxdl.data.pipeline import EvalBatches, Pipeline, eval_batches
from jaxdl.data.prefetch import prefetch
from jaxdl.data.sources import ArraySource, Source, Subset
from jaxdl.data.splits import check_labels, split_rows
from jaxdl.data.tables import Table, load_diabetes, read_table
from jaxdl.data.tfds import TfdsSource, load_tfds
from jaxdl.data.transforms import FillMissing, Standardize, fit_fill_missing, fit_standardize, one_hot

__all__ = [
    "CIFAR10_CLASSES",
    "ArraySource",
    "EvalBatches",
    "FillMissing",
    "ImageFolder",
    "Order",
    "Pipeline",
    "Source",
    "Standardize",
    "Subset",
    "Table",
    "TfdsSource",
    "check_labels",
    "color_jitter",
    "cutmix",
    "cutout",
    "eval_batches",
    "fit_fill_missing",
    "fit_standardize",
    "load_cifar10",
    "load_diabetes",
    "load_digits",
    "load_fashion_mnist",
    "load_idx",
    "load_tfds",
    "mixup",
    "one_hot",
    "prefetch",
    "rand_augment",
    "random_crop",
    "random_flip",
    "random_rotate",
    "read_idx",
    "read_table",
    "split_rows",
]
