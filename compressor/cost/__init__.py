"""Cost: parameters, multiply-accumulates, bytes and latency. Every name carries its unit."""

from compressor.cost.latency import latencies
from compressor.cost.macs import costs, layer_macs, lowered_macs

__all__ = ["costs", "latencies", "layer_macs", "lowered_macs"]
