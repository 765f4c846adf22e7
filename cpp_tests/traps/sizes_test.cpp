// Traps at their full size, on the CPU and on a GPU. The PTX machine has smaller ones.
#include "copies.h"

using namespace flashtile::test;

TEST("L2 15,000 batches, backward") { check_copies(one_batch(2, 30, 30, 64), 15000); }

TEST("V10 80,000 batches of 16 rows") { check_copies(one_batch(1, 16, 16, 16), 80000); }
