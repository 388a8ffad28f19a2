"""Graph rewrites over the exported ONNX model, one a file."""
