"""Array types are checked in every test run: the hook must stand before the first import of sfumato."""

from jaxtyping import install_import_hook

install_import_hook("sfumato", "beartype.beartype")
