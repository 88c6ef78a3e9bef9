"""How a model is cut into stages."""


def analyze_shared_weights_across_stages(*_: object) -> list:
    return []
