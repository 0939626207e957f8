"""What will happen, before it happens: a step compiled for devices that are not here."""

from jaxdl.plan.flops import count_flops
from jaxdl.plan.sketch import NoSketch, Remedy, Sketch, array
from jaxdl.plan.topology import Topology, TopologyError, parse_topology

__all__ = [
    "NoSketch",
    "Remedy",
    "Sketch",
    "Topology",
    "TopologyError",
    "array",
    "count_flops",
    "parse_topology",
]
