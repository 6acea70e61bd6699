"""What will happen: recipes, and the plan that lists it for every tensor of a checkpoint. Headers only, no data."""
