"""flashtile under the names that other packages call: one module for each of them.

Nothing here is imported with flashtile; each module is imported where it is wanted, and
imports the package that it serves only then. What a host asks for and flashtile cannot compute
is refused with a sentence that names the argument, never left out.
"""
