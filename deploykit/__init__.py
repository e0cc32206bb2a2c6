"""From a PyTorch CNN to a verified engine on the device; docs/api.md lists the names that other programs may use."""
