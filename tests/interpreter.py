"""Triton's interpreter at half its time: a kernel patches Triton's language once, not for each function it calls, and
the table of types is not built anew for every value."""


class _Patched:
    """What a kernel's launch has patched, as the interpreter's own scope: `restore` undoes it."""

    active = False

    def __init__(self, *scopes) -> None:
        self.scopes = scopes
        _Patched.active = True

    def restore(self) -> None:
        for scope in reversed(self.scopes):
            scope.restore()
        _Patched.active = False


def speed_up() -> None:
    """From now on the interpreter works so; with a Triton that is built otherwise, or without one, nothing changes."""
    try:
        from triton.language.standard import cdiv
        from triton.runtime import interpreter

        patch, nothing, find = interpreter._patch_lang, interpreter._LangPatchScope(), interpreter._get_np_dtype
    except (ImportError, AttributeError):
        return

    def patch_once(fn):
        if _Patched.active:
            return nothing
        return _Patched(patch(fn), patch(cdiv.fn))  # the second has what Triton's own functions see

    def np_dtype(kind):
        scalar = kind.scalar
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    known = {}
    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype
