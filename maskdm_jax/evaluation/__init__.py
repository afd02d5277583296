"""How good samples are: Inception features and the numbers made of them."""
