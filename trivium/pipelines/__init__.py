"""``trivium run``: the stages of a recipe, each on what earlier ones produced."""
