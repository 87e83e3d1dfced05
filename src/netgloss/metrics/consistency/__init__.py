"""How consistent the concept of a unit is, on real and on adversarial images."""
