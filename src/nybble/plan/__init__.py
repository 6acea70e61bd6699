"""What will happen: recipes, and the plan for every tensor of a checkpoint. Headers only."""
