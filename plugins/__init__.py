"""Compression methods, one folder each, registered by entry points exactly as a third party's would be."""
