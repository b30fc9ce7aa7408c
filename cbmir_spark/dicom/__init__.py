"""One .dcm object → tags and a 256×256 gray picture, after the Standard. Without Spark."""
