"""``trivium compare``: train several methods from one base at equal budget and compare them."""
