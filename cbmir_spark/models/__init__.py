"""Networks, the files that a trained model travels in, and the registry that names them. Without Spark."""
