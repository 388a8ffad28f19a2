/// @file sha256.h
/// SHA-256 of a file (FIPS 180-4), to tell a damaged engine before TensorRT reads it.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace tinylm {

/// Returns a file's SHA-256 as 64 hexadecimal digits.
/// @throws std::runtime_error It can't be read.
std::string sha256(const std::filesystem::path& path);

/// Compares files of a directory with its SHA256SUMS.
/// @param directory What `tinylm-export trt` wrote.
/// @param names Files that must be listed and intact.
/// @param way_out What to do about a damaged one, for messages.
/// @throws std::runtime_error SHA256SUMS or a file is missing, or a file is truncated or altered.
void check_sums(const std::filesystem::path& directory, const std::vector<std::string>& names,
                const std::string& way_out);

}  // namespace tinylm
