// Numbers of 16 bits that travel for wider ones. Rounded to nearest, ties to even, as torch does.
#pragma once

#include <cstdint>
#include <cstring>

namespace hvd_saef {

inline uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// IEEE's binary16: 5 bits of exponent, 10 of fraction.
struct Half {
  uint16_t bits;
  static constexpr float kLargest = 65504.f;

  static Half nearest(float number) {
    const uint32_t all = bits_of(number), sign = all >> 16 & 0x8000;
    uint32_t magnitude = all & 0x7fffffff;
    if (magnitude > 0x7f800000) magnitude = 0x7e00;        // NaN
    else if (magnitude >= 0x47800000) magnitude = 0x7c00;  // 2^16 and more
    else if (magnitude < 0x38800000)                       // below 2^-14: the sum's last bit is 2^-24, as half's is
      magnitude = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    else magnitude = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return {static_cast<uint16_t>(sign | magnitude)};
  }
  float number() const {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));
    return float_of(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
  }
};

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
  static constexpr float kLargest = 0x1.fep127f;

  static BFloat16 nearest(float number) {
    const uint32_t all = bits_of(number);
    if ((all & 0x7fffffff) > 0x7f800000) return {0x7fc0};  // NaN
    return {static_cast<uint16_t>((all + 0x7fff + (all >> 16 & 1)) >> 16)};
  }
  float number() const { return float_of(static_cast<uint32_t>(bits) << 16); }
};

}  // namespace hvd_saef
