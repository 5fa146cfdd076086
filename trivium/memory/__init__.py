"""How much memory a run needs, predicted from its configuration before anything is loaded."""
