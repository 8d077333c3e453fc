"""The one exception the command line prints without a traceback."""


class UserError(Exception):
    """Something the user can put right: one line saying what, where and what to do."""
