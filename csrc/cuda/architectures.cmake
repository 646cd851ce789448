# CMake's words for architectures become what they stand for: the module says what it holds code for, in numbers.
if(CMAKE_CUDA_ARCHITECTURES MATCHES "^(native|all|all-major)$")
  set(RECMAS_WORD "${CMAKE_CUDA_ARCHITECTURES}")
  string(TOUPPER "CMAKE_CUDA_ARCHITECTURES_${RECMAS_WORD}" RECMAS_MEANT)
  string(REPLACE "-" "_" RECMAS_MEANT "${RECMAS_MEANT}")
  set(CMAKE_CUDA_ARCHITECTURES ${${RECMAS_MEANT}})
  if(NOT CMAKE_CUDA_ARCHITECTURES MATCHES "^[0-9]")  # nvcc's own words where it finds no device
    message(FATAL_ERROR "CUDA architectures ${RECMAS_WORD}: ${CMAKE_CUDA_ARCHITECTURES}")
  endif()
endif()
