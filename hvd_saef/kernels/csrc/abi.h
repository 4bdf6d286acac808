// What Python hands over, by a plain C interface: nothing of torch or of Python, so that one library serves
// every version of both. compiled.py looked at the tensors: their dtype, that they are on the CPU and
// without gaps. Lengths and contents are looked at here.
#pragma once

#include <cstdint>

extern "C" {

// Memory and how many elements it has; size -1 where it is not given.
struct Flat {
  void* data;
  int64_t size;
};

// What a kernel is given, in the order of compiled.py's _Call; what one has no use for is not looked at.
struct Call {
  int64_t number;   // bytes of a number in memory: 4, float32; 8, float64
  int64_t value;    // the kind of numbers that travel: Value in topk_payload.h
  int64_t threads;  // torch's
  Flat memory;      // delta, out, or what is settled
  Flat runs;        // rows of four int64, see Run
  Flat payload;     // to be written; or the one that was sent
  Flat other;       // x when encoding, e when decoding
  Flat server;      // s
  double alpha, beta;
  Flat points;      // of Flat: pieces end to end
  Flat payloads;    // of Flat
  double weight;
};

}  // extern "C"
