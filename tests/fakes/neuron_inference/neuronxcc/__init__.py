"""See README.md."""

from placeholder_modules import install

__version__ = "2.21.33363.0+stand.in"
install()
