"""Fine-tuning as a user does it: commands of the tutorial, and configs that cannot be used."""
