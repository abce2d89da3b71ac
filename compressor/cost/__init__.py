"""Cost: parameters, multiply-accumulates, bytes and latency. Every name carries its unit."""

from compressor.cost.latency import latencies, latency_entry
from compressor.cost.macs import costs, layer_macs, lowered_macs

__all__ = ["costs", "latencies", "latency_entry", "layer_macs", "lowered_macs"]
