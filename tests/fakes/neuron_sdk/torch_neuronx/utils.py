"""The platform, as the library names it."""


def get_platform_target() -> str:
    return "trn1"
