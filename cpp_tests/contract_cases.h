// More of the table in cases.h: windows and alignments, rows in use, head dims.
#pragma once

#include <cstdint>
#include <vector>

#include "case.h"

namespace flashtile::test {

// Windows of several widths, both sides, one side, with and without a diagonal.
inline std::vector<Mask> few_windows() { return {{32, 64}, {0, 0}, {5, -1}, {-1, 7}, {64, 0}}; }

// Bounds that no int32 holds, or that overflow when they are added to a position.
inline std::vector<Mask> huge_windows() {
  constexpr int64_t kAboveInt32 = int64_t{1} << 32, kMost = INT64_MAX;
  return {{kAboveInt32, kAboveInt32},
          {3, kAboveInt32},
          {kAboveInt32, 3},
          {kMost, 0},
          {0, kMost},
          {kMost, kMost}};
}

inline std::vector<Mask> top_left_masks() {
  return {kCausalTopLeft, {-1, -1, true}, {32, 64, true},
          {0, 0, true},   {9, -1, true},  {-1, 7, true}};
}

// Windows: bands that leave whole blocks, rows or keys out; lengths on and beside block edges.
inline std::vector<Case> window_cases() {
  return {
      {.name = "windows", .seqlen_q = 97, .seqlen_k = 97, .masks = few_windows()},
      {.name = "windows, block edges",
       .batch = 2,
       .seqlen_q = 128,
       .seqlen_k = 128,
       .masks = {{63, 0}, {64, 64}, {0, 63}, {127, 127}, {128, 1}, {15, 16}}},
      {.name = "windows, more keys",
       .seqlen_q = 77,
       .seqlen_k = 300,
       .masks = {{32, 64}, {0, 0}, {250, 10}, {5, -1}, {-1, 7}}},
      {.name = "windows, more queries",
       .seqlen_q = 200,
       .seqlen_k = 77,
       .masks = {{32, 64}, {0, 0}, {5, -1}, {-1, 7}, {-1, 100}, {10, 100}, {-1, 123}}},
      {.name = "windows, one query", .seqlen_q = 1, .seqlen_k = 150, .masks = {{40, 0}, {0, 0}}},
      {.name = "windows, two queries over many keys",
       .heads = 2,
       .heads_kv = 1,
       .seqlen_q = 2,
       .seqlen_k = 400,
       .masks = {{130, 0}, {64, 64}}},
      {.name = "windows, one key", .seqlen_q = 100, .seqlen_k = 1, .masks = {{0, 0}, {20, 30}}},
      {.name = "windows, GQA",
       .batch = 2,
       .heads = 4,
       .heads_kv = 2,
       .seqlen_q = 70,
       .seqlen_k = 90,
       .masks = {{20, 10}, {-1, 0, true}}},
      {.name = "windows of int64", .seqlen_q = 40, .seqlen_k = 70, .masks = huge_windows()},
      {.name = "windows, no keys",
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 40,
       .seqlen_k = 0,
       .masks = {{3, 3}}},
      {.name = "windows, values x 3",
       .seqlen_q = 90,
       .seqlen_k = 140,
       .masks = {{30, 5}},
       .values = Values::kTriple},
      {.name = "windows, every logit near -120",
       .seqlen_q = 64,
       .seqlen_k = 192,
       .masks = {{40, 20}},
       .values = Values::kVeryNegative},
      {.name = "windows, deterministic",
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 150,
       .seqlen_k = 190,
       .masks = {{40, 20}, {64, 0}},
       .deterministic = true},
      {.name = "top-left, more keys", .seqlen_q = 70, .seqlen_k = 190, .masks = top_left_masks()},
      {.name = "top-left, more queries",
       .batch = 2,
       .seqlen_q = 190,
       .seqlen_k = 70,
       .masks = top_left_masks()},
      {.name = "varlen: windows",
       .heads = 2,
       .heads_kv = 1,
       .lengths_q = {1, 64, 17, 0, 129},
       .lengths_k = {64, 1, 33, 5, 100},
       .masks = {{32, 64}, {0, 0}, {5, -1}, {-1, 7}, {20, 10, true}, kCausalTopLeft}},
  };
}

// Rows in use, and rows that belong to no sequence: NaN in the inputs, 0 and -inf in the results.
inline std::vector<Case> used_cases() {
  return {
      {.name = "keys in use",
       .batch = 4,
       .heads = 2,
       .heads_kv = 1,
       .seqlen_q = 40,
       .seqlen_k = 150,
       .used_k = {150, 64, 1, 0}},
      {.name = "queries in use",
       .batch = 4,
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 150,
       .seqlen_k = 50,
       .used_q = {150, 64, 1, 0}},
      {.name = "queries and keys in use",
       .batch = 5,
       .seqlen_q = 130,
       .seqlen_k = 130,
       .used_q = {1, 130, 65, 0, 100},
       .used_k = {129, 17, 65, 130, 0},
       .masks = {kFull, kCausal, kCausalTopLeft, {20, 10}, {9, -1, true}}},
      {.name = "decode into a cache",
       .batch = 3,
       .heads = 6,
       .heads_kv = 2,
       .seqlen_q = 1,
       .seqlen_k = 300,
       .used_k = {7, 300, 128},
       .masks = {kFull, kCausal, {50, 0}}},
      {.name = "in use, padded",
       .batch = 2,
       .heads = 2,
       .heads_kv = 1,
       .seqlen_q = 70,
       .seqlen_k = 90,
       .used_q = {33, 70},
       .used_k = {90, 41},
       .layout = Layout::kPadded},
      {.name = "in use, mixed layouts",
       .batch = 2,
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 40,
       .seqlen_k = 66,
       .used_q = {40, 5},
       .used_k = {3, 66},
       .layout = Layout::kMixed},
      {.name = "in use, deterministic",
       .batch = 2,
       .seqlen_q = 90,
       .seqlen_k = 140,
       .used_q = {70, 90},
       .used_k = {140, 100},
       .deterministic = true},
      {.name = "in use, nothing",
       .batch = 2,
       .heads = 2,
       .heads_kv = 2,
       .seqlen_q = 20,
       .seqlen_k = 30,
       .used_q = {0, 0},
       .used_k = {0, 0}},
      {.name = "varlen: keys in use",
       .heads = 2,
       .heads_kv = 1,
       .lengths_q = {33, 0, 80, 5},
       .lengths_k = {70, 20, 130, 9},
       .used_k = {64, 20, 0, 1}},
      {.name = "varlen: queries and keys in use",
       .heads = 2,
       .heads_kv = 2,
       .lengths_q = {64, 17, 129, 40},
       .lengths_k = {64, 33, 100, 70},
       .used_q = {30, 17, 128, 0},
       .used_k = {64, 9, 65, 70},
       .masks = {kFull, kCausal, kCausalTopLeft, {20, 10}}},
      {.name = "varlen: rows of no sequence",
       .heads = 2,
       .heads_kv = 1,
       .lengths_q = {40, 0, 30},
       .lengths_k = {50, 7, 64},
       .tail_q = 70,
       .tail_k = 33},
      {.name = "varlen: no sequence has a row",
       .heads = 2,
       .heads_kv = 2,
       .lengths_q = {0, 0},
       .lengths_k = {0, 0},
       .tail_q = 130,
       .tail_k = 20},
      {.name = "varlen: rows of no sequence, in use, padded",
       .heads = 2,
       .heads_kv = 1,
       .lengths_q = {33, 50},
       .lengths_k = {70, 20},
       .used_q = {33, 1},
       .used_k = {69, 20},
       .tail_q = 1,
       .tail_k = 65,
       .masks = {kFull, kCausal, {20, 10}},
       .layout = Layout::kPadded},
      {.name = "varlen: rows of no sequence, deterministic",
       .lengths_q = {70, 90},
       .lengths_k = {100, 90},
       .tail_q = 64,
       .tail_k = 64,
       .deterministic = true},
  };
}

// Few and small, to be multiplied with many head dims.
inline std::vector<Case> head_dim_cases() {
  return {
      {.name = "GQA", .batch = 2, .heads = 4, .heads_kv = 2, .seqlen_q = 70, .seqlen_k = 97},
      {.name = "rows without keys", .heads = 2, .heads_kv = 1, .seqlen_q = 150, .seqlen_k = 77},
      {.name = "window", .seqlen_q = 90, .seqlen_k = 140, .masks = {{30, 20}, {9, -1, true}}},
      {.name = "padded",
       .batch = 2,
       .heads = 2,
       .heads_kv = 1,
       .seqlen_q = 33,
       .seqlen_k = 65,
       .layout = Layout::kPadded},
      {.name = "varlen", .lengths_q = {65, 0, 40}, .lengths_k = {64, 5, 130}},
      {.name = "in use",
       .batch = 2,
       .seqlen_q = 40,
       .seqlen_k = 70,
       .used_q = {33, 40},
       .used_k = {70, 1}},
  };
}

// head_dim_v as head_dim: every slice, its edges, and dims that no 16 bytes divide.
inline std::vector<HeadDims> equal_head_dims() {
  return {8, 16, 32, 40, 72, 80, 96, 104, 112, 160, 192, 200, 256, 1, 7, 33, 63, 65, 100, 255};
}

// head_dim_v smaller and larger than head_dim.
inline std::vector<HeadDims> unequal_head_dims() {
  return {{64, 32}, {32, 64},   {64, 128}, {128, 64}, {192, 128}, {128, 192},
          {96, 40}, {256, 128}, {24, 8},   {37, 19},  {5, 200},   {200, 3}};
}

}  // namespace flashtile::test
