"""The class of all warnings."""


class DMJDWarning(UserWarning):
    """Something is likely not what the user means, or is replaced by something else; the work goes on.

    All Python warnings of the package are of this class: ``warnings.filterwarnings("error", category=DMJDWarning)``.
    """
