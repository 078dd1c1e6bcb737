"""The one place that names the operators' namespace."""

NAMESPACE = "sknet_triton"
