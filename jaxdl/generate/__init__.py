"""Text from a language model, token by token: greedy, sampled or by beam search."""

from jaxdl.generate.generate import generate
from jaxdl.generate.request import GenerateError
from jaxdl.generate.sampling import Sampling, filter_logits

__all__ = ["GenerateError", "Sampling", "filter_logits", "generate"]
