"""What whoever calls can put right. The command line shows such an error as one line, without a traceback."""


class UserError(Exception):
    """The root of them."""


class SettingsError(UserError, ValueError):
    """Settings that make no sense, or not together."""
