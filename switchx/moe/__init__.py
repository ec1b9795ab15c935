"""The mixture-of-experts layer: routing, placement, dispatch, experts, combine."""
