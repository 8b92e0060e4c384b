"""What is made of a trained model: reference densities, pictures, and samples measured against the data."""
