"""What is made of a trained model: reference densities to compare with, and pictures."""
