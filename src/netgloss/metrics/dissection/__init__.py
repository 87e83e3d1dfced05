"""Which annotated concepts the axes of a basis detect (network dissection)."""
