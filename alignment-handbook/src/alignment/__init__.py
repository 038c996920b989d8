"""What surrounds a training run: recipes, data, models, sampling, reports. Knows no loss and no trainer."""
