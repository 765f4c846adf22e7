// main() of a test executable that has several sources.
#undef FLASHTILE_CHECK_OWN_MAIN
#include "check.h"
