"""A class that takes another's place where that one is constructed, and nowhere else."""


def constructed_by(real: type, make) -> type:
    """A stand-in for the class ``real`` whose construction is ``make(...)``.

    ``make`` returns instances of ``real``; these, and all that others make, are instances of the stand-in too. So it
    may take the name of ``real`` in a module: for ``isinstance``, annotations and class attributes it is ``real``.
    """

    class StandInType(type(real)):
        def __call__(cls, *args, **kwargs):
            return make(*args, **kwargs)

        def __instancecheck__(cls, instance):
            return isinstance(instance, real)

    return StandInType(real.__name__, (real,), {"__doc__": real.__doc__, "__module__": real.__module__})
