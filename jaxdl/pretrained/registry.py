"""The families that jaxdl has; a new one is an import and a name in the list."""

from jaxdl.pretrained.bert import BERT
from jaxdl.pretrained.clip import CLIP_FAMILY, CLIP_TEXT, CLIP_VISION
from jaxdl.pretrained.distilbert import DISTILBERT
from jaxdl.pretrained.family import Family
from jaxdl.pretrained.gpt2 import GPT2_FAMILY
from jaxdl.pretrained.llama import LLAMA_FAMILIES
from jaxdl.pretrained.roberta import ROBERTA
from jaxdl.pretrained.t5 import T5_FAMILY
from jaxdl.pretrained.vit import VIT

FAMILIES: tuple[Family, ...] = (
    BERT,
    ROBERTA,
    DISTILBERT,
    GPT2_FAMILY,
    *LLAMA_FAMILIES,
    T5_FAMILY,
    CLIP_FAMILY,
    CLIP_TEXT,
    CLIP_VISION,  # before ViT, which its module is derived from
    VIT,
)
