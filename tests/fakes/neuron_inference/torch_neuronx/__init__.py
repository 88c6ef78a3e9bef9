"""See README.md."""

from placeholder_modules import install

install()
